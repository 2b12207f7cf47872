"""Reading a training that runs without a hand in it: its batch, its optimizer, its trainer."""
