"""Parts of a message that are no text: what reads each kind, and turns it into embeddings."""
