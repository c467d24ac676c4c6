"""`python -m bots`: the same as the `distributary` command."""

from bots.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
