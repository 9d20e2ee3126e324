"""From pairs in the normal form to token ids, cut to length, with a report."""
