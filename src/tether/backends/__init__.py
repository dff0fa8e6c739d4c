"""Who does the work: the in-process sampler and learner."""
