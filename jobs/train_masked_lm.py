"""`ray job submit … -- python jobs/train_masked_lm.py --config NAME --data TABLE --out URL --workers N --resume`.

Accepts the options of `bsq-ray train masked-lm`. It stops and resumes as `train_tokenizer.py` does.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["train", "masked-lm", *sys.argv[1:]])
