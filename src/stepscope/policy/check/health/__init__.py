"""Is a run healthy? What its checkpoints, held against each other, and its log say."""
