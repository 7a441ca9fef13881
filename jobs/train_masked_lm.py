"""`ray job submit … -- python jobs/train_masked_lm.py --config NAME --data TABLE --out URL --workers N --resume`.

Takes what `bsq-ray train masked-lm` takes; stops and goes on as `train_tokenizer.py` does.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train", "masked-lm"]
    main()
