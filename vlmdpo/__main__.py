"""`python -m vlmdpo` is the same program as `vlmdpo`."""

from vlmdpo.cli import main

if __name__ == "__main__":
    main()
