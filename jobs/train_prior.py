"""`ray job submit … -- python jobs/train_prior.py --config NAME --data TABLE --out URL --workers N --resume`.

Accepts the options of `bsq-ray train prior`. It stops and resumes as `train_tokenizer.py` does.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["train", "prior", *sys.argv[1:]])
