"""`python -m semid_client`: the `semid` command of this very interpreter."""

from semid_client.cli import main

if __name__ == "__main__":
    main()
