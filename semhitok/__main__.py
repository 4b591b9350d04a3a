"""`python -m semhitok`: the command line without its script."""

from semhitok.cli import main

raise SystemExit(main())
