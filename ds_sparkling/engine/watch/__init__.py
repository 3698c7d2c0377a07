"""What is measured on a running engine and shown in its monitors."""
