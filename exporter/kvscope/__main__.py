"""`python -m kvscope` is the command kvscope."""

from kvscope.cli import main

main()
