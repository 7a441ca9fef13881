"""`ray job submit … -- python jobs/tokenize_images.py --model M --data URL --out TABLE --workers N`.

Takes what `bsq-ray tokenize` takes, and works on the cluster the job runs on; what is already there is not done again.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tokenize"]
    main()
