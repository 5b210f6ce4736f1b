"""What a ledger's runs say: estimates, verdicts, caveats, as plain data."""
