//! From layers to a verdict.
//!
//! Memory goes down through the layers until one copies; whoever reads it
//! more than once on that way decides.

use std::path::PathBuf;

use crate::{
    Alignment, AtomicWrites, DirectWrite, FileSystem, Layer, Radius, Reads, Report, Shows,
    Tristate, Verdict, Writes,
};

/// What was found, before it is judged.
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) kernel: String,
    pub(crate) file_system: Option<FileSystem>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) direct_write: DirectWrite,
    pub(crate) alignment: Option<Alignment>,
    pub(crate) atomic_writes: Option<AtomicWrites>,
    pub(crate) physical_block_bytes: Option<u32>,
}

/// What a layer does to memory that reaches it.
enum Effect<'a> {
    Passes,
    Copies,
    Hurts(Radius, Shows),
    Unknown(&'a str, &'a Option<String>),
}

/// One direction, from the top to where the memory is copied.
struct Course<'a> {
    answer: Tristate,
    radius: Radius,
    /// The layer that decides, and how its damage shows.
    hurt: Option<(&'a Layer, Shows)>,
    unknown: Option<(&'a Layer, &'a str, &'a Option<String>)>,
    copied: Option<&'a Layer>,
}

impl<'a> Course<'a> {
    fn of(layers: &'a [Layer], effect: impl Fn(&'a Layer) -> Effect<'a>) -> Self {
        let mut course = Course {
            answer: Tristate::No,
            radius: Radius::Nobody,
            hurt: None,
            unknown: None,
            copied: None,
        };
        // Nothing below this depth sees the program's memory.
        let mut cut: Option<usize> = None;
        // The ancestors with redundancy, by their depth.
        let mut redundant: Vec<usize> = Vec::new();
        for layer in layers {
            redundant.retain(|depth| *depth < layer.depth);
            if cut.is_some_and(|depth| layer.depth > depth) {
                continue;
            }
            cut = None;
            match effect(layer) {
                Effect::Passes => {}
                Effect::Copies => {
                    cut = Some(layer.depth);
                    course.copied.get_or_insert(layer);
                }
                Effect::Hurts(radius, shows) => {
                    // A leg that answers with an error is thrown out for it.
                    let radius = if redundant.is_empty() { radius } else { Radius::Everyone };
                    if course.hurt.is_none() || radius > course.radius {
                        course.hurt = Some((layer, shows));
                    }
                    course.radius = course.radius.max(radius);
                }
                Effect::Unknown(why, root) => {
                    course.unknown.get_or_insert((layer, why, root));
                }
            }
            if layer.redundant {
                redundant.push(layer.depth);
            }
        }
        course.answer = match (&course.hurt, &course.unknown) {
            (Some(_), _) => Tristate::Yes,
            (None, Some(_)) => Tristate::Unknown,
            (None, None) => Tristate::No,
        };
        if course.unknown.is_some() {
            // INSP-1.
            course.radius = Radius::Everyone;
        }
        course
    }
}

pub(crate) fn report(found: Found) -> Report {
    let Found { path, kernel, file_system, layers, direct_write, .. } = found;
    let Found { alignment, atomic_writes, physical_block_bytes, .. } = found;
    let writes = Course::of(&layers, |layer| match &layer.writes {
        Writes::Passes => Effect::Passes,
        Writes::Copies => Effect::Copies,
        Writes::Twice { radius, shows } => Effect::Hurts(*radius, *shows),
        Writes::Unknown { why, root_would_show } => Effect::Unknown(why, root_would_show),
    });
    let reads = Course::of(&layers, |layer| match &layer.reads {
        Reads::Passes => Effect::Passes,
        Reads::Copies => Effect::Copies,
        Reads::Verifies { radius } => Effect::Hurts(*radius, Shows::ErrorReading),
        Reads::Unknown { why, root_would_show } => Effect::Unknown(why, root_would_show),
    });
    let verdict = verdict(&writes, &reads);
    let reason = reason(&writes, &reads);
    let advice = advice(&verdict, &writes, &reads, &layers);
    Report {
        path,
        kernel,
        file_system,
        direct_write,
        alignment,
        atomic_writes,
        physical_block_bytes,
        write_radius: writes.radius,
        read_radius: reads.radius,
        shows: writes.hurt.or(reads.hurt).map(|(_, shows)| shows),
        verdict,
        reason,
        advice,
        samples_writes_twice: writes.answer,
        verifies_reads: reads.answer,
        layers,
    }
}

fn verdict(writes: &Course<'_>, reads: &Course<'_>) -> Verdict {
    if writes.hurt.is_some() || reads.hurt.is_some() {
        return Verdict::AtRisk;
    }
    match writes.unknown.or(reads.unknown) {
        Some((layer, why, root)) => Verdict::Unknown {
            why: format!("{}: {why}", layer.name),
            root_would_show: root.clone(),
        },
        None => Verdict::Safe,
    }
}

fn reason(writes: &Course<'_>, reads: &Course<'_>) -> String {
    if let Some((layer, _)) = writes.hurt.or(reads.hurt) {
        return layer.sentence();
    }
    if let Some((layer, why, _)) = writes.unknown.or(reads.unknown) {
        return format!("{}: {why}", layer.name);
    }
    match writes.copied {
        Some(layer) => layer.sentence(),
        None => "nothing below reads the data more than once".to_owned(),
    }
}

fn advice(verdict: &Verdict, writes: &Course<'_>, reads: &Course<'_>, layers: &[Layer]) -> String {
    let stable = "run the program under `stableio run`, or serve the image to its guest with `stableio serve --raw`";
    match verdict {
        Verdict::Safe => {
            "Nothing to do: a buffer that changes in flight hurts nobody here.".to_owned()
        }
        Verdict::AtRisk => {
            let culprit = writes.hurt.or(reads.hurt).map(|(layer, _)| layer);
            let remedy = culprit.and_then(|layer| layer.remedy.as_ref());
            // The file system may know of a kernel that protects.
            let remedy = remedy.or_else(|| layers.first()?.remedy.as_ref());
            match remedy {
                Some(remedy) => sentence(&format!("{remedy}; or {stable}")),
                None => sentence(stable),
            }
        }
        Verdict::Unknown { root_would_show: Some(what), .. } => {
            format!("Ask again as root, who sees {what}; until then take it for at risk.")
        }
        Verdict::Unknown { .. } => sentence(&format!("take it for at risk: {stable}")),
    }
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    first.into_iter().chain(letters).chain(['.']).collect()
}
