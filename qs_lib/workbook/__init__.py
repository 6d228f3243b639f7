"""The notebooks' machinery: parameters, stages of a run, sweeps, figures, tables, the scoreboard."""
