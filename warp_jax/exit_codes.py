"""Exit codes of all commands."""

UNEXPECTED, BAD_INPUT, USER_FUNCTION, MEMORY, STORAGE, TRY_AGAIN, INTERRUPTED = 1, 2, 70, 71, 74, 75, 130
EXIT_CODES = {  # an exception may name its own in an attribute `exit_code`
    0: "done",
    UNEXPECTED: "an unexpected error",
    BAD_INPUT: "bad input, or the job cannot continue",
    USER_FUNCTION: "a function of the user's failed, such as a reward",
    MEMORY: "out of memory",
    STORAGE: "a file is damaged, or cannot be read or written",
    TRY_AGAIN: "the same command may work later",
    INTERRUPTED: "stopped by SIGINT",
}
