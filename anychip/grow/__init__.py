"""A model becomes a larger one that computes the same: width, heads, depth, vocabulary, context, with its optimizer.

roles     which dimension of which tensor is hidden, ffn, query heads, ...: what a family adds to
axes      where each unit of a grown dimension comes from
depth     where each layer of the deeper model comes from
plan      one growth: from which shape to which, how
tensors   a block of a grown tensor (weights and moments) out of the old one's
opening   masks that open over steps, and parts of tensors that are younger than the rest
proof     are the logits what they were?
source, units, stream, together    a checkpoint into a grown one, block by block, by several processes
estimate  what that will take
stage, hand                growth inside a run, and by hand
"""
