"""Run the command line as a module: ``accelerate launch -m hf_pss.cli train ...``."""

from hf_pss.cli.app import main

if __name__ == "__main__":
    main()
