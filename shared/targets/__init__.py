"""What is kept of a teacher at a position, and how it becomes byte planes: targets, hidden states.

Which planes a shard has, and in what order, is `shared/format`'s matter.
"""
