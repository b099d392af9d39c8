"""What connects the library to transformers and to the Hub."""
