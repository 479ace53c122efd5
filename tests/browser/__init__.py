"""Every page of the site and every report in a browser: `make browser`, or `python -m tests.browser --help`."""
