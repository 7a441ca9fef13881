"""`ray job submit … -- python jobs/train_tokenizer.py --config NAME --data URL --out URL --workers N --resume`.

Takes what `bsq-ray train tokenizer` takes, and trains on the cluster the job runs on. `ray job stop` leaves a
checkpoint and a model; the same submission with `--resume` goes on from there, or begins where there is nothing yet.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train", "tokenizer"]
    main()
