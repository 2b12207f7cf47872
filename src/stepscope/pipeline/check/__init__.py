"""``stepscope check``: is a checkpoint, or a configuration, fit for use?"""
