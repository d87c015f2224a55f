"""`python -m genkd` is the `genkd` command; torchrun starts ranks this way."""

from .cli import main

main()
