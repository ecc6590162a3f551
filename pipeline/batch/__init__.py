"""Many cases: what is to be done, what was done, what failed and why.

The data plane is the file system: one atomic record per case is the only truth, tables are derived
from records, and a claim per case lets several runs share one output folder.

Modules:
    runner        a batch from its cases to its tables, in this process or in worker processes
    planning      what a run has to do, and what is known of a case from its header
    coordinator   who gets which case next, and what follows when a process died
    case_worker   one case: read, compute, write its output and then its record
    records       the record of a case
    reading       what an output folder holds, for reports
    tables        cases.csv, volumes.csv and run.json, derived from records
    statistics    volumes in mL, as fractions, by side, in long form, as FreeSurfer writes them
    bids_derivatives, bids_group   the other files of BIDS derivatives; the group's table
    dicom_outputs     the DICOM objects of a case
    identity      whose results a folder holds: model, settings, runtime
    resume        whether a case is done: these bytes in, these bytes out
    claims, locks     who works on which case
    failures      why a case failed, in words
    suspects      cases during which a process died
    dask_executor, dask_worker   an executor on Dask `distributed`: its client, its workers
    many          many images in several processes, with their results in memory
    pool, stages  worker processes; reading, computing and writing at the same time
    shards, resources   parts of a batch for several jobs; the cores and memory allotted
    outputs, log_file, peak_memory   names in an output folder, volseg.log, memory per case
"""

from pipeline.batch.bids_derivatives import (
    BidsDerivatives,
    check_derivatives_folder,
    remove_orphans,
)
from pipeline.batch.bids_group import GroupTable, write_group_table
from pipeline.batch.coordinator import Progress
from pipeline.batch.dask_executor import dask_executor
from pipeline.batch.dicom_outputs import with_dicom_outputs
from pipeline.batch.many import predict_many
from pipeline.batch.outputs import output_path
from pipeline.batch.planning import Forecast, choose_jobs, forecast_cases
from pipeline.batch.reading import (
    BatchResults,
    count_records,
    file_problem,
    is_complete,
    read_case,
    read_results,
)
from pipeline.batch.records import CaseRecord, FileState
from pipeline.batch.resources import allotted_cores, allotted_memory
from pipeline.batch.runner import (
    BatchSummary,
    local_executor,
    pool_executor,
    run_batch,
    run_bundle,
    segment_cases,
)
from pipeline.batch.shards import Shard, parse_shard
from pipeline.batch.statistics import write_statistics
from pipeline.batch.tables import case_columns, write_tables

__all__ = [
    "BatchResults",
    "BatchSummary",
    "BidsDerivatives",
    "CaseRecord",
    "FileState",
    "Forecast",
    "GroupTable",
    "Progress",
    "Shard",
    "allotted_cores",
    "allotted_memory",
    "case_columns",
    "check_derivatives_folder",
    "choose_jobs",
    "count_records",
    "dask_executor",
    "file_problem",
    "forecast_cases",
    "is_complete",
    "local_executor",
    "output_path",
    "parse_shard",
    "pool_executor",
    "predict_many",
    "read_case",
    "read_results",
    "remove_orphans",
    "run_batch",
    "run_bundle",
    "segment_cases",
    "with_dicom_outputs",
    "write_group_table",
    "write_statistics",
    "write_tables",
]
