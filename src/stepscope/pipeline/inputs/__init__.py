"""What a verb opens before it works: policies, tasks, and what speaks against them."""
