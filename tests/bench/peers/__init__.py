"""The same load against other servers of the same weights: `make bench-peers`.

    engines     who takes part, and how each is started and asked
    dialects    what goes to an engine over HTTP, and what its events mean
    servers     an engine as a process: started, asked, stopped
    cases       what is measured
    turns       A B C A B C ...: who is measured when, and what else the machine did meanwhile
    machine     processor time, memory and bandwidth, from /proc and a small C program
    report      medians, spreads and ratios of what was measured undisturbed
    plot        the picture of a report; runs where matplotlib is installed
    weights     the checkpoint in the form that each engine reads
    openvino_driver   OpenVINO GenAI as a process that is asked through a pipe

Every engine lives in an environment of its own under build/peers; what is pinned there is in pins/.
"""
