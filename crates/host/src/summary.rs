//! What a session did, read out of its shared memory.
//!
//! Programs under test could have scribbled over it (SHARE-2), so numbers are checked and texts
//! taken as they are.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use stableio_session::{
    Answer, Effect, Engine, FILES, FRAMES, Finding, Kind, RANGES, Remark, SITES, Session, TICK_NS,
    TICKS, Text,
};

use crate::symbols::{Place, Symbols};

/// A file and what was done with its I/O. Fields as in [`stableio_session::File`].
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "documented there")]
pub struct FileUse {
    pub path: String,
    #[serde(serialize_with = "effect_name")]
    pub effect: Option<Effect>,
    pub private_reads: bool,
    pub reason: String,
    pub writes: u64,
    pub write_bytes: u64,
    pub bounced: u64,
    pub fallen_back: u64,
    pub reads: u64,
    pub reads_bounced: u64,
    pub refused: u64,
    pub unprotected: u64,
    pub changed: u64,
    pub depth: u64,
}

/// What a session has to say about what it could not do.
#[derive(Debug, Clone, Serialize)]
pub struct RemarkCount {
    /// The kind, as a word for programs.
    pub kind: &'static str,
    /// The kind, as part of a sentence.
    #[serde(skip)]
    pub text: &'static str,
    /// How often.
    pub count: u64,
}

/// Sums over all files and processes. Fields as in [`stableio_session::Totals`].
#[derive(Debug, Clone, Copy, Serialize)]
#[expect(missing_docs, reason = "documented there")]
pub struct Totals {
    pub processes: u64,
    pub watched: u64,
    pub unwatched: u64,
    pub changed: u64,
    pub reused: u64,
    pub lost: u64,
}

/// A place from which direct writes were submitted.
#[derive(Debug, Clone, Serialize)]
pub struct SiteUse {
    /// Its number, by which findings name it.
    pub id: u32,
    /// The interface.
    pub engine: &'static str,
    /// Direct writes from here.
    pub writes: u64,
    /// Those whose buffer changed.
    pub changed: u64,
    /// I/Os into a buffer in flight.
    pub reused: u64,
    /// The stack, innermost first; inlined functions are frames of their own.
    pub stack: Vec<Place>,
}

/// One finding.
#[derive(Debug, Clone, Serialize)]
pub struct FindingUse {
    /// `changed` or `reused`.
    pub kind: &'static str,
    /// The interface.
    pub engine: &'static str,
    /// The file's path.
    pub file: String,
    /// [`SiteUse::id`].
    pub site: u32,
    /// Process that submitted.
    pub pid: u32,
    /// Thread that submitted.
    pub tid: u32,
    /// Where in the file; `None`: at the file's own position.
    pub offset: Option<u64>,
    /// Bytes of the write.
    pub len: u64,
    /// How many of them had changed.
    pub changed: u64,
    /// The first ranges of them, from start to before end, in the write's data.
    pub ranges: Vec<[u32; 2]>,
    /// Seconds since the session's start.
    pub submitted_s: f64,
    /// Seconds since the session's start.
    pub completed_s: f64,
}

/// Direct writes over time, in steps of `step_s` seconds.
#[derive(Debug, Clone, Serialize)]
pub struct Timeline {
    /// Seconds of a step.
    pub step_s: f64,
    /// Direct writes that completed in each step.
    pub watched: Vec<u32>,
    /// Those whose buffer had changed.
    pub changed: Vec<u32>,
}

/// All that `detect` found.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "each is documented at its type")]
pub struct Detected {
    pub totals: Totals,
    pub files: Vec<FileUse>,
    /// By number of changed writes, then of writes.
    pub sites: Vec<SiteUse>,
    pub findings: Vec<FindingUse>,
    /// Findings for which there was no room.
    pub findings_not_kept: u64,
    pub timeline: Timeline,
    pub remarks: Vec<RemarkCount>,
}

/// The files of a session, those with most I/O first.
pub fn files(session: &Session) -> Vec<FileUse> {
    let mut files: Vec<_> = (0..FILES).filter_map(|slot| file(session, slot)).collect();
    files.sort_by_key(|file| std::cmp::Reverse(file.writes + file.reads));
    files
}

fn file(session: &Session, slot: usize) -> Option<FileUse> {
    let file = &session.files[slot];
    let answer = Answer { slot: slot as u32, bits: file.answer.load(Ordering::Acquire) };
    let mut path = text(&file.path);
    let did = [&file.writes, &file.reads, &file.refused, &file.unprotected];
    if slot == 0 {
        path = "(files for which there was no room)".to_owned();
        if did.iter().all(|counter| load(counter) == 0) {
            return None;
        }
    } else if answer.bits == 0 {
        return None;
    }
    Some(FileUse {
        path,
        effect: answer.effect(),
        private_reads: answer.private_reads(),
        reason: text(&file.reason),
        writes: load(&file.writes),
        write_bytes: load(&file.write_bytes),
        bounced: load(&file.bounced),
        fallen_back: load(&file.fallen_back),
        reads: load(&file.reads),
        reads_bounced: load(&file.reads_bounced),
        refused: load(&file.refused),
        unprotected: load(&file.unprotected),
        changed: load(&file.changed),
        depth: load(&file.depth),
    })
}

/// What the session could not do, of each kind that there was.
pub fn remarks(session: &Session) -> Vec<RemarkCount> {
    let all = Remark::ALL.into_iter().map(|remark| {
        let (kind, text) = words(remark);
        RemarkCount { kind, text, count: load(&session.remarks[remark as usize]) }
    });
    all.filter(|remark| remark.count > 0).collect()
}

fn words(remark: Remark) -> (&'static str, &'static str) {
    match remark {
        Remark::Static => ("static", "calls of statically linked programs"),
        Remark::NoLibrary => ("no_library", "calls of programs that do not load the library"),
        Remark::SqPoll => ("sqpoll", "rings that a kernel thread polls (SQPOLL)"),
        Remark::Ring => ("ring", "rings that can not be protected here"),
        Remark::RawClone => ("raw_clone", "calls of threads or processes made by a raw clone"),
        Remark::Splice => ("splice", "splice, sendfile or copy_file_range into a protected file"),
        Remark::NoNet => ("no_net", "processes in which the kernel spreads no net"),
        Remark::NoMemory => ("no_memory", "I/Os for which there was no memory (--pool)"),
        Remark::NoAnswer => ("no_answer", "files that could not be classified"),
        Remark::Atomic => ("atomic", "atomic writes, which --policy uncached can not do"),
        Remark::Other => ("other", "other calls"),
    }
}

/// Sums of a session.
pub fn totals(session: &Session) -> Totals {
    let totals = &session.totals;
    Totals {
        processes: load(&totals.processes),
        watched: load(&totals.watched),
        unwatched: load(&totals.unwatched),
        changed: load(&totals.changed),
        reused: load(&totals.reused),
        lost: load(&totals.lost),
    }
}

/// All that a session found, with names for places. `ended_ns`: when the command ended.
pub fn detected(session: &Session, ended_ns: u64) -> Detected {
    let made = load(&session.findings.made);
    let room = session.findings.kept.len() as u64;
    let here = session.findings.kept.iter().take(made.min(room) as usize);
    let mut findings: Vec<_> = here.filter_map(|f| finding_use(session, f)).collect();
    let (sites, same) = sites(session);
    for finding in &mut findings {
        finding.site = same.get(&finding.site).copied().unwrap_or(finding.site);
    }
    Detected {
        totals: totals(session),
        files: files(session),
        sites,
        findings,
        findings_not_kept: made.saturating_sub(room),
        timeline: timeline(session, ended_ns),
        remarks: remarks(session),
    }
}

/// The places, and for each slot the number of its place: a place that lay at other addresses in
/// another process has a slot for each.
fn sites(session: &Session) -> (Vec<SiteUse>, HashMap<u32, u32>) {
    let mut symbols = Symbols::default();
    let mut sites: Vec<SiteUse> = Vec::new();
    let mut same = HashMap::new();
    let mut known = HashMap::new();
    for site in (0..SITES).filter_map(|id| site(session, id, &mut symbols)) {
        let at = *known.entry((site.engine, site.stack.clone())).or_insert(sites.len());
        same.insert(site.id, sites.get(at).map_or(site.id, |first| first.id));
        match sites.get_mut(at) {
            Some(first) => {
                first.writes += site.writes;
                first.changed += site.changed;
                first.reused += site.reused;
            }
            None => sites.push(site),
        }
    }
    sites.sort_by_key(|site| std::cmp::Reverse((site.changed + site.reused, site.writes)));
    (sites, same)
}

fn site(session: &Session, id: usize, symbols: &mut Symbols) -> Option<SiteUse> {
    let site = &session.sites.sites[id];
    let (writes, changed, reused) = (load(&site.writes), load(&site.changed), load(&site.reused));
    if writes + changed + reused == 0 {
        return None;
    }
    let depth = (site.depth.load(Ordering::Acquire) as usize).min(FRAMES);
    let stack = site.frames[..depth].iter().flat_map(|frame| {
        let offset = load(&frame.offset);
        let module = frame.module.load(Ordering::Relaxed) as usize;
        let module = module.checked_sub(1).and_then(|index| session.sites.modules.get(index));
        symbols.places(module.map(|module| text(&module.path)).as_deref(), offset)
    });
    let stack = stack.collect();
    let engine = engine_name(site.engine.load(Ordering::Relaxed));
    Some(SiteUse { id: id as u32, engine, writes, changed, reused, stack })
}

fn finding_use(session: &Session, finding: &Finding) -> Option<FindingUse> {
    let kind = match finding.kind.load(Ordering::Acquire) {
        k if k == Kind::Changed as u32 => "changed",
        k if k == Kind::Reused as u32 => "reused",
        _ => return None,
    };
    let started = load(&session.started_ns);
    let seconds = |at: &AtomicU64| load(at).saturating_sub(started) as f64 / 1e9;
    let slot = finding.file.load(Ordering::Relaxed) as usize;
    let file = session.files.get(slot).filter(|_| slot != 0);
    let ranges = (0..RANGES).map(|n| [0, 1].map(|e| finding.ranges[n][e].load(Ordering::Relaxed)));
    Some(FindingUse {
        kind,
        engine: engine_name(finding.engine.load(Ordering::Relaxed)),
        file: file.map(|file| text(&file.path)).unwrap_or_default(),
        site: finding.site.load(Ordering::Relaxed),
        pid: finding.pid.load(Ordering::Relaxed),
        tid: finding.tid.load(Ordering::Relaxed),
        offset: Some(load(&finding.offset)).filter(|offset| *offset != u64::MAX),
        len: load(&finding.len),
        changed: load(&finding.changed),
        ranges: ranges.filter(|range| *range != [0, 0]).collect(),
        submitted_s: seconds(&finding.submitted_ns),
        completed_s: seconds(&finding.completed_ns),
    })
}

fn timeline(session: &Session, ended_ns: u64) -> Timeline {
    let length_ns = ended_ns.saturating_sub(load(&session.started_ns));
    let steps = (length_ns.div_ceil(TICK_NS) as usize).clamp(1, TICKS);
    let column = |of: fn(&stableio_session::Tick) -> &std::sync::atomic::AtomicU32| {
        session.ticks[..steps].iter().map(|tick| of(tick).load(Ordering::Relaxed)).collect()
    };
    Timeline {
        step_s: TICK_NS as f64 / 1e9,
        watched: column(|tick| &tick.watched),
        changed: column(|tick| &tick.changed),
    }
}

fn engine_name(number: u32) -> &'static str {
    match number {
        n if n == Engine::Sync as u32 => "sync",
        n if n == Engine::PosixAio as u32 => "posixaio",
        n if n == Engine::KernelAio as u32 => "libaio",
        n if n == Engine::Uring as u32 => "io_uring",
        _ => "unknown",
    }
}

fn effect_name<S: serde::Serializer>(effect: &Option<Effect>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(match effect {
        Some(Effect::Untouched) => "untouched",
        Some(Effect::Bounce) => "bounce",
        Some(Effect::Uncached) => "uncached",
        Some(Effect::Refuse) => "refuse",
        None => "unknown",
    })
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn text<const N: usize>(text: &Text<N>) -> String {
    let mut bytes = [0; N];
    String::from_utf8_lossy(text.get(&mut bytes)).into_owned()
}
