"""`python -m qlora_train` is `qlora-train`."""

from qlora_train.cli.main import main

if __name__ == "__main__":
    main()
