"""Run the command line as `python -m bsq_ray`."""

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main()
