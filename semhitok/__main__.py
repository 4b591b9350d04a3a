"""`python -m semhitok`: the command line."""

from semhitok.cli import main

raise SystemExit(main())
