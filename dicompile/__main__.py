"""``python -m dicompile``: the command line."""

from dicompile.cli import main

if __name__ == "__main__":
    main()
