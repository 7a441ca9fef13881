"""`ray job submit … -- python jobs/train_tokenizer.py --config NAME --data URL --out URL --workers N --resume`.

Accepts the options of `bsq-ray train tokenizer`. Training runs on the cluster of the job. `ray job stop` saves a
checkpoint and a model. The same submission with `--resume` resumes; it starts a new run if the folder is empty.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["train", "tokenizer", *sys.argv[1:]])
