from srdd.schedulers.scheduling_scale import ScaleScheduler, ScaleSchedulerOutput


__all__ = ["ScaleScheduler", "ScaleSchedulerOutput"]
