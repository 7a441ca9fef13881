"""`ray job submit … -- python jobs/evaluate_generation.py --model M --data URL --out URL --workers N`.

Takes what `bsq-ray evaluate generation` takes, and measures on the cluster the job runs on.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate", "generation"]
    main()
