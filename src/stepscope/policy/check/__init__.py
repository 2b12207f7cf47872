"""Is a checkpoint fit to be measured? What it computes, whether its derivatives hold, and what is missing."""
