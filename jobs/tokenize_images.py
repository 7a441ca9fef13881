"""`ray job submit … -- python jobs/tokenize_images.py --model M --data URL --out TABLE --workers N`.

Accepts the options of `bsq-ray tokenize`. Tokenization runs on the cluster of the job; existing parts are not repeated.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["tokenize", *sys.argv[1:]])
