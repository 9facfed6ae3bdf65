"""Training a small HY-WU of the published architecture, end to end from the edit loss, with the modules that inference runs.

Order of the files: ``recipe`` (sizes and schedules) · ``photos`` ``edits`` ``language`` ``batches`` (pictures, what is done to
them, how people ask for it, a batch of it) · ``linear_vae`` ``channels`` ``copier`` ``places`` (the start that needs no
gradient) · ``forward`` (the two losses) · ``loop`` (steps, log, resume) · ``base_stage`` ``generator_stage`` ``baselines`` ·
``run`` ``export`` ``sheets`` · ``evaluate``.
"""
