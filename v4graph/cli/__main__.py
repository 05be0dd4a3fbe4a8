"""`python -m v4graph.cli`, for a checkout that is not installed."""

from v4graph.cli import main

main()
