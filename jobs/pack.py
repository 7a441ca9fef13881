"""`ray job submit … -- python jobs/pack.py SRC DEST`.

Accepts the options of `bsq-ray data pack`. Packing runs on the cluster of the job.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["data", "pack", *sys.argv[1:]])
