"""`python -m troupe` is the same as `troupe`."""

from troupe.cli import main

if __name__ == "__main__":
    main()
