"""`ray job submit … -- python jobs/index.py URL`.

Accepts the options of `bsq-ray data index`. Indexing runs on the cluster of the job.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["data", "index", *sys.argv[1:]])
