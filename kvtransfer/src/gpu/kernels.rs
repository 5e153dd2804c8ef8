//! Copies by lists: one launch moves any number of pages, pieces or head slices between any addresses that the device
//! reaches, its own memory, a peer's mapping, or pinned host memory.
//!
//! By default a launch takes at most 8 % of the device's multiprocessors, so that a model beside it keeps the rest. On
//! Hopper and later such a launch uses the multiprocessors' bulk copy engines, which keep far more bytes in flight than
//! threads can.
#![expect(
    unsafe_code,
    reason = "launches kernels over addresses that the caller vouches for"
)]

use std::{ffi::c_void, ops::Range, sync::Arc};

mod crc;
mod divide;
mod lists;
mod module;
mod nvrtc;
mod source;
mod tables;
pub mod twin;

use crc::Tables as CrcTables;
pub use crc::crc32c;
use lists::{Bulk, BulkShape, Shape, WindowTables};
pub use lists::{Pair, Piece, Rows, Side, Window};
use module::{Function, Module};
pub use module::{KernelOptions, Origin};
use tables::{READ_IN_PLACE_MAX, SLOT_BYTES, Tables};

use super::{
    driver::Context,
    error::GpuError,
    memory::DeviceBuffer,
    stream::{Priority, Stream},
};

/// The share of multiprocessors that a polite launch takes, in percent.
pub const POLITE_PERCENT: u32 = 8;

/// Most blocks of a launch: more would only wait.
pub const BLOCKS_MAX: u32 = 1 << 16;

/// Pairs of a slot.
const SLOT_PAIRS: usize = SLOT_BYTES / size_of::<Pair>();

/// Rows from which a block alone is faster with bulk copies: 447 to 468 GB/s on an H200's 10 blocks against 358 to 441 through
/// registers, and 150 against 439 at 1 KiB.
const BULK_ROW_BYTES_MIN: u32 = 4096;

/// Threads of a block that has a multiprocessor to itself.
const THREADS_ALONE: u32 = 1024;

/// Threads of a block among many.
const THREADS_AMONG_MANY: u32 = 256;

/// Blocks for each multiprocessor of a launch without bound: enough that late ones fill the gaps that early ones leave.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 16;

/// How many multiprocessors a launch may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Blocks {
    /// [`POLITE_PERCENT`] of them, one block each.
    #[default]
    Polite,
    /// All of them.
    Full,
    /// So many blocks, clamped to 1..=[`BLOCKS_MAX`]; up to the number of multiprocessors each has one to itself.
    Count(u32),
}

/// Which kind of kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Method {
    /// The one that has shown to be faster for these blocks.
    #[default]
    Auto,
    /// Units through registers.
    Vector,
    /// Rows through shared memory, where device and shape allow.
    Bulk,
    /// The same by one warp on every multiprocessor, beside whatever else runs there; the number of blocks is not looked at,
    /// but for [`Blocks::Count`], which is kept to.
    Thin,
}

/// How a copy is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Launch {
    /// How many multiprocessors.
    pub blocks: Blocks,
    /// Which kind of kernel.
    pub method: Method,
}

impl From<Blocks> for Launch {
    fn from(blocks: Blocks) -> Self {
        Self {
            blocks,
            method: Method::Auto,
        }
    }
}

impl Launch {
    /// Blocks of a launch on a device of so many multiprocessors, and whether each has one to itself.
    fn blocks(self, multiprocessors: u32) -> (u32, bool) {
        let all = multiprocessors.max(1);
        let count = match self.blocks {
            Blocks::Polite => (all * POLITE_PERCENT / 100).max(1),
            Blocks::Full => all * BLOCKS_PER_MULTIPROCESSOR,
            Blocks::Count(count) => count.clamp(1, BLOCKS_MAX),
        };
        (count, count <= all)
    }
}

/// The copy kernels, loaded on one device.
pub struct Kernels {
    context: Arc<Context>,
    module: Module,
    tables: Tables,
    crc: DeviceBuffer,
}

impl Kernels {
    /// Loads the kernels: compiled by NVRTC, from its cache on disk, or the built-in PTX where there is no NVRTC.
    ///
    /// # Errors
    /// A device that is too old, or the driver's reasons.
    pub fn load(context: &Arc<Context>, options: &KernelOptions) -> Result<Arc<Self>, GpuError> {
        let module = Module::load(context, options)?;
        let crc = DeviceBuffer::new(context, size_of::<CrcTables>())?;
        let stream = Stream::new(context, Priority::Low)?;
        crc.write(&stream, bytemuck::bytes_of(&CrcTables::new()))?;
        Ok(Arc::new(Self {
            context: Arc::clone(context),
            module,
            tables: Tables::new(context)?,
            crc,
        }))
    }

    /// Where they came from.
    #[must_use]
    pub fn origin(&self) -> Origin {
        self.module.origin
    }

    /// Whether the device has bulk kernels.
    #[must_use]
    pub fn has_bulk(&self) -> bool {
        self.module.bulk.is_some()
    }

    /// Copies rows of the same shape behind each pair of addresses: pages ([`Rows::page`]), or head slices packed and
    /// unpacked. As many launches as the lists need (65,536 pairs each).
    ///
    /// # Errors
    /// [`GpuError::Misuse`] and [`GpuError::Limit`] for shapes that no launch can take, else the driver's.
    ///
    /// # Safety
    /// Until the stream has passed this, all sources and targets must stay mapped for this device; targets must be the
    /// caller's to write and overlap neither each other nor a source.
    pub unsafe fn copy_pages(
        &self,
        stream: &Stream,
        pairs: &[Pair],
        rows: Rows,
        launch: impl Into<Launch>,
    ) -> Result<(), GpuError> {
        let launch = launch.into();
        lists::check_rows(&rows)?;
        let (mut rest, mut slot_pairs) = (pairs, lists::first_launch(pairs.len(), SLOT_PAIRS));
        while !rest.is_empty() {
            // The bits are looked at launch by launch, so that the device starts before the host has read the whole list.
            let part = &rest[..rest.len().min(slot_pairs)];
            let bits = part
                .iter()
                .fold(0, |bits, pair| bits | pair.source | pair.target);
            let width = lists::width(bits | lists::row_bits(&rows));
            let part = &part[..part.len().min(lists::pairs_per_launch(&rows, width))];
            rest = &rest[part.len()..];
            slot_pairs = (slot_pairs * 4).min(SLOT_PAIRS);
            let range = 0..rows.len_bytes() * part.len() as u64;
            let how = self.how(launch, width, &rows, &range)?;
            self.tables.with(
                stream,
                &[bytemuck::cast_slice(part)],
                READ_IN_PLACE_MAX,
                |mut table| {
                    let table = (&raw mut table).cast();
                    // SAFETY: the kernels' own type; the caller vouches for the addresses in the table.
                    unsafe { self.enqueue(stream, launch, how, self.by_pairs(), table) }
                },
            )?;
        }
        Ok(())
    }

    /// Copies a part of a logical stream: buffers times items times rows, described without listing them.
    ///
    /// # Errors
    /// [`GpuError::Misuse`] and [`GpuError::Limit`] for windows that no launch can take (lists over a MiB, 2^31 units),
    /// else the driver's.
    ///
    /// # Safety
    /// As for [`Self::copy_pages`], for every address that the window describes within its range.
    pub unsafe fn copy_window(
        &self,
        stream: &Stream,
        window: &Window<'_>,
        launch: impl Into<Launch>,
    ) -> Result<(), GpuError> {
        let launch = launch.into();
        let width = lists::check_window(window)?;
        let how = self.how(launch, width, &window.rows, &window.range)?;
        let list = |items: Option<&'_ [i32]>| items.map_or(0, size_of_val);
        debug_assert_eq!(
            WindowTables::bytes(window),
            size_of_val(window.buffers) + list(window.source.items) + list(window.target.items)
        );
        let parts: [&[u8]; 3] = [
            bytemuck::cast_slice(window.buffers),
            window.source.items.map_or(&[], bytemuck::cast_slice),
            window.target.items.map_or(&[], bytemuck::cast_slice),
        ];
        // Each entry is read many times: not over the bus.
        self.tables.with(stream, &parts, 0, |address| {
            let mut tables = WindowTables::at(window, address);
            let tables = (&raw mut tables).cast();
            // SAFETY: the kernels' own type; the caller vouches for the addresses that the window describes.
            unsafe { self.enqueue(stream, launch, how, self.by_window(), tables) }
        })
    }

    /// Copies pieces of any lengths and alignments.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Self::copy_pages`].
    pub unsafe fn copy_pieces(
        &self,
        stream: &Stream,
        pieces: &[Piece],
        launch: impl Into<Launch>,
    ) -> Result<(), GpuError> {
        const WARP: u32 = 32;
        let launch = launch.into();
        let slot_tiles = SLOT_BYTES / size_of::<Piece>();
        let mut tiles = lists::tiles(pieces);
        let mut part = Vec::with_capacity(slot_tiles.min(pieces.len()));
        loop {
            part.clear();
            part.extend(tiles.by_ref().take(slot_tiles));
            if part.is_empty() {
                return Ok(());
            }
            let mut count = u32::try_from(part.len()).expect("invariant: a slot is a MiB");
            self.tables.with(
                stream,
                &[bytemuck::cast_slice(&part)],
                READ_IN_PLACE_MAX,
                |mut table| {
                    let grid = self.grid(launch, count * WARP);
                    let mut values = [(&raw mut table).cast(), (&raw mut count).cast::<c_void>()];
                    // SAFETY: the kernel's own types; the caller vouches for the addresses in the table.
                    unsafe {
                        self.module
                            .launch(self.module.tiles, stream, grid, &mut values)
                    }
                },
            )?;
        }
    }

    /// Copies pages and writes the CRC32C of each to `sums`, an array of as many `u32` in device or pinned memory.
    ///
    /// # Errors
    /// [`GpuError::Misuse`] unless pages and addresses are multiples of 16, else the driver's.
    ///
    /// # Safety
    /// As for [`Self::copy_pages`], and `sums` must stay mapped and be the caller's to write.
    pub unsafe fn copy_pages_checked(
        &self,
        stream: &Stream,
        pairs: &[Pair],
        bytes: u32,
        sums: u64,
        launch: impl Into<Launch>,
    ) -> Result<(), GpuError> {
        const WARP: u32 = 32;
        let launch = launch.into();
        let bits = pairs
            .iter()
            .fold(0, |bits, pair| bits | pair.source | pair.target);
        lists::check_rows(&Rows::page(bytes))?;
        if lists::width(bits | u64::from(bytes)) < 16 || !sums.is_multiple_of(4) {
            return Err(GpuError::Misuse(
                "checked pages are multiples of 16 bytes at multiples of 16",
            ));
        }
        for (place, part) in pairs.chunks(SLOT_PAIRS).enumerate() {
            let mut count = u32::try_from(part.len()).expect("invariant: a slot is a MiB");
            let mut sums = sums + (place * SLOT_PAIRS * 4) as u64;
            let (mut crc, mut vectors) = (self.crc.address(), bytes / 16);
            self.tables.with(
                stream,
                &[bytemuck::cast_slice(part)],
                READ_IN_PLACE_MAX,
                |mut table| {
                    let mut values: [*mut c_void; 5] = [
                        (&raw mut table).cast(),
                        (&raw mut sums).cast(),
                        (&raw mut crc).cast(),
                        (&raw mut count).cast(),
                        (&raw mut vectors).cast(),
                    ];
                    let grid = self.grid(launch, count * WARP);
                    // SAFETY: the kernel's own types; the caller vouches for the addresses in the table and the sums.
                    unsafe {
                        self.module
                            .launch(self.module.checked, stream, grid, &mut values)
                    }
                },
            )?;
        }
        Ok(())
    }

    /// The device's context.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Grid and block of a launch of so many units: no more blocks than have something to do.
    fn grid(&self, launch: Launch, units: u32) -> (u32, u32, u32) {
        let (blocks, is_alone) = launch.blocks(self.context.facts().multiprocessors);
        let threads = if is_alone {
            THREADS_ALONE
        } else {
            THREADS_AMONG_MANY
        };
        (blocks.min(units.div_ceil(threads)).max(1), threads, 0)
    }

    fn bulk_grid(&self, launch: Launch, shape: &BulkShape, bulk: Bulk) -> (u32, u32, u32) {
        let multiprocessors = self.context.facts().multiprocessors.max(1);
        if bulk == Bulk::Thin {
            let wanted = match launch.blocks {
                Blocks::Count(count) => count.clamp(1, BLOCKS_MAX),
                Blocks::Polite | Blocks::Full => multiprocessors,
            };
            let blocks = wanted.min(shape.total).max(1);
            return (blocks, module::THIN_THREADS, module::THIN_SHARED_BYTES);
        }
        // One block fills a multiprocessor's shared memory.
        let blocks = launch.blocks(multiprocessors).0.min(multiprocessors);
        let warps = module::BULK_THREADS / 32;
        let blocks = blocks.min(shape.total.div_ceil(warps)).max(1);
        (blocks, module::BULK_THREADS, module::BULK_SHARED_BYTES)
    }

    /// Chooses the kind of kernel, and its shape.
    fn how(
        &self,
        launch: Launch,
        width: u32,
        rows: &Rows,
        range: &Range<u64>,
    ) -> Result<How, GpuError> {
        let (_, is_alone) = launch.blocks(self.context.facts().multiprocessors);
        let wanted = match launch.method {
            Method::Auto => (is_alone && rows.bytes >= BULK_ROW_BYTES_MIN).then_some(Bulk::Wide),
            Method::Vector => None,
            Method::Bulk => Some(Bulk::Wide),
            Method::Thin => Some(Bulk::Thin),
        };
        let wanted = wanted.filter(|_| width == 16 && self.module.bulk.is_some());
        if let Some(bulk) = wanted
            && let Some(shape) = BulkShape::new(rows, range, bulk)
        {
            return Ok(How::Bulk(shape, bulk));
        }
        Ok(How::Units(Shape::new(rows, width, range)?, width))
    }

    fn by_pairs(&self) -> Functions<'_> {
        let module = &self.module;
        Functions {
            units: &module.pairs,
            deep: module.deep,
            bulk: module.bulk.map(|bulk| (bulk.wide.0, bulk.thin.0)),
        }
    }

    fn by_window(&self) -> Functions<'_> {
        let module = &self.module;
        Functions {
            units: &module.window,
            deep: module.window[0],
            bulk: module.bulk.map(|bulk| (bulk.wide.1, bulk.thin.1)),
        }
    }

    /// Enqueues the kernel of a shape.
    ///
    /// # Safety
    /// `tables` must point to what these functions take first, and as for [`Self::copy_pages`].
    unsafe fn enqueue(
        &self,
        stream: &Stream,
        launch: Launch,
        how: How,
        functions: Functions<'_>,
        tables: *mut c_void,
    ) -> Result<(), GpuError> {
        let (_, is_alone) = launch.blocks(self.context.facts().multiprocessors);
        match (how, functions.bulk) {
            (How::Bulk(mut shape, bulk), Some((wide, thin))) => {
                let grid = self.bulk_grid(launch, &shape, bulk);
                let function = match bulk {
                    Bulk::Wide => wide,
                    Bulk::Thin => thin,
                };
                let mut values = [tables, (&raw mut shape).cast::<c_void>()];
                // SAFETY: the caller vouches for the tables; the shape is of the kernel's own type.
                unsafe { self.module.launch(function, stream, grid, &mut values) }
            }
            (How::Bulk(..), None) => Err(GpuError::Misuse("this GPU has no bulk kernels")),
            (How::Units(mut shape, width), _) => {
                let function = if is_alone && width == 16 {
                    functions.deep
                } else {
                    functions.units[which(width)]
                };
                let grid = self.grid(launch, shape.total);
                let mut values = [tables, (&raw mut shape).cast::<c_void>()];
                // SAFETY: as above.
                unsafe { self.module.launch(function, stream, grid, &mut values) }
            }
        }
    }
}

/// The kind of kernel of a launch.
#[derive(Clone, Copy)]
enum How {
    Units(Shape, u32),
    Bulk(BulkShape, Bulk),
}

/// The kernels that take the same table.
struct Functions<'a> {
    units: &'a [Function; 4],
    deep: Function,
    /// For wide and for thin blocks.
    bulk: Option<(Function, Function)>,
}

/// The place of a width among a module's functions.
fn which(width: u32) -> usize {
    match width {
        16 => 0,
        8 => 1,
        4 => 2,
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_polite_launch_stays_within_its_share() {
        let polite = Launch::default();
        assert_eq!(polite.blocks(132), (10, true));
        assert_eq!(polite.blocks(108), (8, true));
        assert_eq!(polite.blocks(4), (1, true));
        assert_eq!(Launch::from(Blocks::Full).blocks(132), (2112, false));
        assert_eq!(Launch::from(Blocks::Count(0)).blocks(132), (1, true));
        assert_eq!(
            Launch::from(Blocks::Count(u32::MAX)).blocks(132),
            (BLOCKS_MAX, false)
        );
        assert_eq!(Launch::from(Blocks::Count(132)).blocks(132), (132, true));
    }
}
