"""The command line, `lora-opcm`."""
