"""Command lines around the library; logic that a run needs is never here."""
