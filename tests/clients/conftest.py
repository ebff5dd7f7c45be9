"""What is run by clients' own environments is not collected here."""

collect_ignore = ["calls.py"]
