"""Fine-tunes as `serve` sees them: commands, data sets, the queues and the trainer process (the package finetune).

commands  /finetune, /adapter worst     importing  /adapter import
datasets  rows and stored files         examples   consented conversations and rated replies as a data set
jobs      rows and their states         event_log  events of the trainer as rows
worker    one queue, with backoff       checks, supervisor  its two kinds: data checks, training and publishing
process   one trainer process           protocol   job folder and events, shared with finetune
messages  texts of a job                progress   the message that is edited while a job trains

Entry points: JobSupervisor, the registered commands, answer_to_question. Imports channels, usage, adapters, delivery.
"""
