"""`ray job submit … -- python jobs/evaluate_compression.py --model M --data DIR --out URL --workers N`.

Takes what `bsq-ray evaluate compression` takes, and compresses on the cluster the job runs on.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate", "compression"]
    main()
