"""The lab: models, tasks, data, evaluation, training and reports around the core. Needs the extra `lora-lite[lab]`.

The lab imports the core; the core never imports the lab.
"""
