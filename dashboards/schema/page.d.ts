// A dashboard as Grafana's own types have it, with two changes: an enum is its string, since JSON has no enums, and
// each panel has the options of its kind.

import type * as grafana from "@grafana/schema";
import type * as barchart from "@grafana/schema/dist/esm/raw/composable/barchart/panelcfg/x/BarChartPanelCfg_types.gen";
import type * as bargauge from "@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type * as canvas from "@grafana/schema/dist/esm/raw/composable/canvas/panelcfg/x/CanvasPanelCfg_types.gen";
import type * as heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as timeline from "@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type * as table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";

type Plain<T> = T extends string
  ? `${T}`
  : T extends number
    ? number
    : T extends Array<infer Item>
      ? Plain<Item>[]
      : T extends object
        ? { [Key in keyof T]: Plain<T[Key]> }
        : T;

interface Target {
  datasource: grafana.DataSourceRef;
  expr: string;
  format?: "time_series" | "table" | "heatmap";
  instant?: boolean;
  legendFormat?: string;
  range?: boolean;
  refId: string;
}

type Fields<Custom> = {
  defaults: Plain<Omit<grafana.FieldConfig, "custom">> & { custom?: Plain<Custom> };
  overrides: Plain<grafana.FieldConfigSource["overrides"]>;
};

type PanelOf<Kind extends string, Options, Custom = {}> = Omit<
  Plain<grafana.Panel>,
  "type" | "options" | "fieldConfig" | "targets" | "title" | "gridPos" | "id" | "description"
> & {
  type: Kind;
  title: string;
  description: string;
  id: number;
  gridPos: grafana.GridPos;
  targets: Target[];
  options: Plain<Options>;
  fieldConfig: Fields<Custom>;
};

// The schema knows neither the style of a connection's line nor that the root has what its elements have.
type Connection = canvas.CanvasConnection & { lineStyle: { style: "solid" | "dashed" | "dotted"; animate: boolean } };
type Element = Omit<canvas.CanvasElementOptions, "connections"> & { connections: Connection[] };
type Frame = Omit<canvas.CanvasElementOptions, "connections" | "config"> & { type: "frame"; elements: Element[] };
type Canvas = Omit<canvas.Options, "root"> & { root: Frame };

type Panel =
  | PanelOf<"barchart", barchart.Options, barchart.FieldConfig>
  | PanelOf<"bargauge", bargauge.Options>
  | PanelOf<"canvas", Canvas>
  | PanelOf<"heatmap", heatmap.Options, heatmap.FieldConfig>
  | PanelOf<"stat", stat.Options>
  | PanelOf<"state-timeline", timeline.Options, timeline.FieldConfig>
  | PanelOf<"table", table.Options, grafana.TableFieldOptions>
  | PanelOf<"timeseries", { legend: grafana.VizLegendOptions; tooltip: grafana.VizTooltipOptions }, grafana.GraphFieldConfig>;

type Row = Omit<Plain<grafana.RowPanel>, "panels"> & { panels: Panel[] };

interface Input {
  name: string;
  label: string;
  description: string;
  type: "datasource";
  pluginId: string;
  pluginName: string;
}

// What a query of Prometheus for annotations has besides.
interface Annotation extends Plain<grafana.AnnotationQuery> {
  expr: string;
  step: string;
  textFormat: string;
  titleFormat: string;
  useValueForTime: "on";
}

export type Page = Omit<Plain<grafana.Dashboard>, "panels" | "annotations"> & {
  annotations: { list: Annotation[] }; __inputs?: Input[]; panels: Array<Panel | Row> };
