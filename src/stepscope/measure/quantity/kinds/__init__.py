"""The quantities, one file each, named like the quantity in it."""
