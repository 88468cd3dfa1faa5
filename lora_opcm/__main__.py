"""`python -m lora_opcm`: the command line."""

from .command.app import main

main()
