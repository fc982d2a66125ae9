//! The command `stableio`.
//!
//! Exit codes: 0 done, 1 an error (one line on stderr) or, for `torture`,
//! damage, 2 a wrong command line, 4 `torture` raced too little to show
//! anything. `status`: 0 all arrays healthy, 10 one degraded, 11 one damaged.
//! `probe`: 0 safe, 1 at risk, 2 a path that is not there, 3 it
//! can not tell. `run` and `detect`: the program's own, 126 if it can not be
//! executed (or watched), 127 if it is not there.

mod control;
mod create;
mod demo;
mod detect;
mod export;
mod maintain;
mod members;
mod metrics;
mod probe;
mod report;
mod run;
mod serve;
mod show;
mod status;
mod table;
mod torture;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use stableio_array::Level;
use stableio_mem::Bytes;

use export::ExportSpec;
use metrics::MetricsSpec;

/// Storage whose direct I/O stays correct even when the program changes the
/// buffer while it is being written.
#[derive(Parser)]
#[command(name = "stableio", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a new array of files or block devices
    Create(CreateArgs),
    /// Serves an array, or an image as it is, to guests and network clients
    Serve(ServeArgs),
    /// Lists the arrays whose members lie in directories
    List(ListArgs),
    /// Shows what a member says of itself and its array
    Examine(ExamineArgs),
    /// Asks running servers how they are; exits with 10 if one is degraded, 11 if one is damaged
    Status(StatusArgs),
    /// Fills a file or device that takes a member's place while the array is served
    Replace(ReplaceArgs),
    /// Leaves a member out while the array is served
    Remove(RemoveArgs),
    /// Looks through everything that is stored, and mends what is damaged
    Scrub(ScrubArgs),
    /// Pauses rebuild and scrub of an array
    Pause {
        /// The array's name
        array: String,
    },
    /// Lets rebuild and scrub of an array go on
    Resume {
        /// The array's name
        array: String,
    },
    /// Shows what happened to an array since it is served, with times (UTC)
    Events(EventsArgs),
    /// Says whether a buffer that changes in flight does damage under a path
    Probe(probe::ProbeArgs),
    /// Runs a program with safe direct I/O
    Run(run::RunArgs),
    /// Watches whether a program changes its buffers during direct I/O
    Detect(detect::DetectArgs),
    /// Tries to break an array with memory that changes in flight
    Torture(TortureArgs),
    /// Ten seconds of proof, then a small array to try
    Demo(DemoArgs),
}

#[derive(Args)]
struct CreateArgs {
    /// The array's name: letters, digits, '-', '_', '.'
    name: String,
    /// The members: files (made if --member-size is given) or block devices
    #[arg(required = true)]
    members: Vec<PathBuf>,
    /// Redundancy
    #[arg(long, value_enum, default_value = "raid5")]
    level: LevelArg,
    /// Whether what is being written is noted first; off: a block in flight at a crash may then
    /// be lost, and parity old
    #[arg(long, value_enum, default_value = "on")]
    log: Switch,
    /// What power failure does not tear on any member, 512 or 4KiB; what the disks say unless
    /// given. With 512 the content of every write goes through the log
    #[arg(long, value_parser = atomic_unit)]
    atomic_unit: Option<Bytes>,
    /// A CRC-64 of each 4 KiB block; off: what a member reads back wrong, without an error, is not
    /// noticed, and the content of every write goes through the log
    #[arg(long, alias = "checksum", value_enum, default_value = "on")]
    checksums: ChecksumsArg,
    /// Bytes of a member in a row before the next has its turn
    #[arg(long, default_value = "64KiB")]
    chunk: Bytes,
    /// Size of members that do not exist yet; they take space as they fill
    #[arg(long)]
    member_size: Option<Bytes>,
    /// Overwrite members that hold something
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
struct ServeArgs {
    /// The members in any order, or directories that hold them
    #[arg(required_unless_present = "raw")]
    members: Vec<PathBuf>,
    /// Serve this image, volume or disk as it is instead: no array, no checksums
    #[arg(long, conflicts_with_all = ["members", "trust_member"])]
    raw: Option<PathBuf>,
    /// What to serve it as, once or more
    #[arg(
        long = "export",
        value_name = "TYPE,KEY=VALUE,…",
        required = true,
        help = "What to serve it as, once or more:\n\
                nbd,path=SOCKET|tcp=ADDR:PORT[,name=N][,mode=0660][,group=G][,readonly]\n\
                vhost-user-blk,path=SOCKET[,name=N][,queues=2][,buffers=unstable|stable]\
                [,mode=0660][,group=G][,readonly]"
    )]
    exports: Vec<ExportSpec>,
    /// Where members exclude each other: the one whose data is wanted
    #[arg(long, value_name = "MEMBER")]
    trust_member: Option<PathBuf>,
    /// Buffer memory for all requests; load makes them wait, not memory grow
    #[arg(long, default_value = "64MiB")]
    pool: Bytes,
    /// Memory for cached checksums
    #[arg(long, default_value = "32MiB")]
    tuple_cache: Bytes,
    /// Seconds without an answer after which a member is left out; 0 waits for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    patience: u64,
    /// How memory of programs and guests is read into
    #[arg(long, value_enum, default_value = "direct")]
    reads: ReadsArg,
    /// Counters for Prometheus: textfile=PATH, written every 15 s, or tcp=127.0.0.1:PORT
    #[arg(long, value_name = "WHERE")]
    metrics: Option<MetricsSpec>,
}

#[derive(Args)]
struct ListArgs {
    /// Where to look
    #[arg(default_value = ".")]
    dirs: Vec<PathBuf>,
    /// For programs
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ExamineArgs {
    /// The member
    member: PathBuf,
    /// For programs
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct StatusArgs {
    /// Only the server of this name
    name: Option<String>,
    /// For programs
    #[arg(long)]
    json: bool,
    /// Again and again
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..))]
    watch: Option<u64>,
}

#[derive(Args)]
struct ReplaceArgs {
    /// The array's name
    array: String,
    /// The member that goes: its path as status shows it, or its role's number
    old: String,
    /// What takes its place: a file (made if it is not there) or a block device
    new: PathBuf,
    /// Overwrite what the new one holds
    #[arg(long)]
    force: bool,
    /// Wait until it is filled
    #[arg(long)]
    wait: bool,
}

#[derive(Args)]
struct RemoveArgs {
    /// The array's name
    array: String,
    /// The member: its path as status shows it, or its role's number
    member: String,
}

#[derive(Args)]
struct ScrubArgs {
    /// The array's name
    array: String,
    /// Wait until it is done
    #[arg(long)]
    wait: bool,
    /// Pause the one that is under way
    #[arg(long, conflicts_with_all = ["wait", "resume", "stop"])]
    pause: bool,
    /// Let it go on
    #[arg(long, conflicts_with_all = ["wait", "stop"])]
    resume: bool,
    /// End it; the next one goes on from there
    #[arg(long, conflicts_with = "wait")]
    stop: bool,
}

#[derive(Args)]
struct EventsArgs {
    /// The array's name
    array: String,
    /// Wait for more
    #[arg(long)]
    follow: bool,
}

#[derive(Args)]
struct TortureArgs {
    /// Redundancy of the array to build
    #[arg(long, value_enum, default_value = "raid5")]
    level: LevelArg,
    /// Members of it; unless given single has 1, raid1 2, raid5 3, raid6 5
    #[arg(long)]
    members: Option<usize>,
    /// Faults of the first member, as read-error:1/1000,flip:1/5000; the others must make up for
    /// them
    #[arg(long, value_name = "SPEC")]
    faults: Option<String>,
    /// Seed of the faults
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long
    #[arg(long, default_value_t = 10, conflicts_with = "writes")]
    seconds: u64,
    /// Until so many writes were raced instead
    #[arg(long)]
    writes: Option<u64>,
    /// Declare the memory stable, which is a lie here: the twin that must fail
    #[arg(long)]
    unprotected: bool,
    /// Where to build the array; a directory in memory if there is one
    #[arg(long)]
    dir: Option<PathBuf>,
    /// For programs
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DemoArgs {
    /// How long the proof takes, both halves together
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Where to put the small array
    #[arg(long, default_value = "stableio-demo")]
    dir: PathBuf,
    /// Only the proof, no array to try
    #[arg(long)]
    proof_only: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum LevelArg {
    /// One member, checksums only
    Single,
    /// 2 to 8 members with the same data, all but one may fail
    Raid1,
    /// 3 to 16 members, any one may fail
    Raid5,
    /// 4 to 16 members, any two may fail
    Raid6,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReadsArg {
    /// Straight there, and once more where what came does not match
    Direct,
    /// Privately first and then copied: for programs that change the buffers of their reads
    Eager,
}

/// An atomic unit, as `--atomic-unit` takes it.
fn atomic_unit(text: &str) -> Result<Bytes, String> {
    match text.parse::<Bytes>() {
        Ok(unit) if [512, 4096].contains(&unit.0) => Ok(unit),
        _ => Err("512 or 4KiB".to_owned()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ChecksumsArg {
    /// CRC-64 as in NVMe protection information
    #[value(alias = "crc64-nvme")]
    On,
    /// None
    Off,
}

impl From<LevelArg> for Level {
    fn from(arg: LevelArg) -> Self {
        match arg {
            LevelArg::Single => Level::Single,
            LevelArg::Raid1 => Level::Raid1,
            LevelArg::Raid5 => Level::Raid5,
            LevelArg::Raid6 => Level::Raid6,
        }
    }
}

fn main() -> ExitCode {
    // A reader that goes away (`| head`) ends the command quietly.
    // SAFETY: sets a disposition before any thread runs.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let command = Cli::parse().command;
    if let Err(error) = stableio_onepass::asked_tier() {
        eprintln!("stableio: {error}");
        return ExitCode::FAILURE;
    }
    let result = match command {
        Command::Create(args) => create::run(args),
        Command::Serve(args) => serve::run(args),
        Command::List(args) => show::list(&args.dirs, args.json),
        Command::Examine(args) => show::examine(&args.member, args.json),
        Command::Status(args) => status::run(&args),
        Command::Replace(args) => maintain::replace(&args),
        Command::Remove(args) => maintain::remove(&args),
        Command::Scrub(args) => maintain::scrub(&args),
        Command::Pause { array } => maintain::pause(&array, true),
        Command::Resume { array } => maintain::pause(&array, false),
        Command::Events(args) => maintain::events(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Run(args) => run::run(args),
        Command::Detect(args) => detect::run(args),
        Command::Torture(args) => demo::torture(args),
        Command::Demo(args) => demo::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("stableio: {error:#}");
            ExitCode::FAILURE
        }
    }
}
